"""Claims: what notebooks/claims.yml expects, checked by the notebooks and recorded in claims.csv.

In the profile `custom`, which runs on other images, claims are printed and recorded, but never fail.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import yaml
from filelock import FileLock

from rgap.artifact.outputs import ROOT, figures_dir, profile, save_csv

CLAIMS = ROOT / "notebooks" / "claims.yml"
LOCK = ROOT / "build" / ".claims.lock"
CLAIM_TABLES = ("claims.csv", "claims_times.csv")
COLUMNS = ["id", "notebook", "statement", "source", "expected", "measured", "unit", "holds"]
COMPARISONS = {"at_least": "≥", "at_most": "≤", "equals": "="}
REQUIRED = {"notebook", "statement", "source"}
ASSERTED = ["default", "paper"]
DEFAULTS = {"n": "", "tolerance": 0, "unit": "", "times": False, "profiles": ASSERTED, "minutes": 1}
FIELDS = REQUIRED | COMPARISONS.keys() | DEFAULTS.keys() | {"short"}


def read_claims() -> dict[str, dict]:
    """The claims of notebooks/claims.yml by id.

    Fields of a claim: `notebook`, `statement`, `source` (paper or ours), exactly one of `at_least`, `at_most`, `equals`
    (a number or a text); and, where needed, `short`, the statement in about six words (itself), `n`, on how much it
    rests (nothing), `tolerance` of an `equals` (0), `unit` (none), `times` (false: it is no measured time), `profiles`
    in which it is asserted (default and paper), and `minutes` that its notebook takes (1).

    Returns:
        The claims with every field filled in, and `expected`, a text such as "≥ 90".

    Raises:
        ValueError: If a claim lacks a field, has an unknown one, or not exactly one comparison.

    Example:
        >>> from rgap import artifact
        >>> artifact.read_claims()["01-psnr-float32"]["expected"]
        '≥ 90'
    """
    claims = _read_yaml()["claims"]
    for claim_id, claim in claims.items():
        comparisons = sorted(COMPARISONS.keys() & claim.keys())
        missing, unknown = REQUIRED - claim.keys(), claim.keys() - FIELDS
        if missing or unknown or len(comparisons) != 1:
            raise ValueError(
                f"claim {claim_id} in {CLAIMS.name} lacks {sorted(missing)}, has unknown {sorted(unknown)} and "
                f"compares by {comparisons}; it needs {sorted(REQUIRED)} and exactly one of {sorted(COMPARISONS)}"
            )
        margin = f" ± {claim['tolerance']}" if "tolerance" in claim else ""
        claims[claim_id] = DEFAULTS | {"short": claim["statement"]} | claim
        claims[claim_id]["expected"] = f"{COMPARISONS[comparisons[0]]} {claim[comparisons[0]]}{margin}"
    return claims


def expected_outputs() -> dict[str, list[str]]:
    """The figures and tables that each notebook must write, by its name: `outputs` in notebooks/claims.yml.

    Example:
        >>> from rgap import artifact
        >>> artifact.expected_outputs()["01_reconstruction"][0]
        '01_reconstruction.png'
    """
    return _read_yaml()["outputs"]


def usual_seconds() -> dict[str, float]:
    """How long each notebook takes as a rule, by its name: `seconds` in notebooks/claims.yml.

    Example:
        >>> from rgap import artifact
        >>> artifact.usual_seconds()["01_reconstruction"] < 600
        True
    """
    return _read_yaml().get("seconds", {})


def run_alone() -> list[str]:
    """The notebooks that measure times and have the machine for themselves: `alone` in notebooks/claims.yml.

    Example:
        >>> from rgap import artifact
        >>> artifact.run_alone()
        ['04_timing_vs_dlg']
    """
    return _read_yaml().get("alone", [])


def check_claim(claim_id: str, measured: float | str) -> None:
    """Compares a measured value with a claim of notebooks/claims.yml, prints one line and records it in claims.csv.

    The line shows no measured number, so that it is the same on every machine. A claim about measured times
    (`times: true`) is recorded in claims_times.csv.

    Args:
        claim_id: The claim's id.
        measured: The value, in the claim's unit; anything `float()` takes, or a text where the claim equals a text.

    Raises:
        ValueError: If claims.yml has no such claim.
        AssertionError: If the claim does not hold and the profile is one in which it is asserted.

    Example:
        >>> from rgap import artifact
        >>> artifact.check_claim("01-exact", 1.0)
        01-exact CNN6, share of attacks that certify their result as exact: = 1: True
    """
    claims = read_claims()
    if not isinstance(claim_id, str) or claim_id not in claims:
        raise ValueError(f"claim {claim_id!r} is not in {CLAIMS.name}; it has {', '.join(claims) or 'none'}")
    claim = claims[claim_id]
    measured = measured if isinstance(measured, str) else float(measured)
    holds = _holds(claim, measured)
    # Four digits are all that a claim needs; where it rests on rounding errors, fewer repeat on another machine.
    shown = measured if isinstance(measured, str) else f"{measured:.4g}"
    row = pd.DataFrame([{**claim, "id": claim_id, "measured": shown, "holds": str(holds)}])
    _update(CLAIM_TABLES[claim["times"]], lambda rows: pd.concat([rows[rows["id"] != claim_id], row]))
    expected = f"{claim['expected']} {claim['unit']}".rstrip()
    print(f"{claim_id} {claim['statement']}: {expected}: {holds}")
    if not holds and profile() in claim["profiles"]:
        raise AssertionError(f"claim {claim_id} fails: measured {shown}, expected {expected}")


def forget_claims(notebook: str) -> None:
    """Removes a notebook's rows from the claims tables, so that only what its next run measures stands there.

    Example:
        >>> from rgap import artifact
        >>> artifact.forget_claims("01_reconstruction")
    """
    for name in CLAIM_TABLES:
        if (figures_dir() / name).exists():
            _update(name, lambda rows: rows[rows["notebook"] != notebook])


def report() -> tuple[pd.DataFrame, list[str]]:
    """The rows of claims.csv and claims_times.csv, and a line for each claim that fails or was not measured.

    Each expected figure or table that is absent adds a line, too.

    Example:
        >>> from rgap import artifact
        >>> rows, problems = artifact.report()
        >>> list(rows.columns[:2])
        ['id', 'notebook']
    """
    rows = pd.concat([_read_csv(figures_dir() / name) for name in CLAIM_TABLES]).sort_values("id")
    holds = dict(zip(rows["id"], rows["holds"], strict=True))
    outputs = [figures_dir() / name for names in expected_outputs().values() for name in names]
    problems = [f"{path} is missing; `make clean figures` writes it again" for path in outputs if not path.is_file()]
    for claim_id, claim in read_claims().items():
        if claim_id not in holds:
            problems.append(f"claim {claim_id} was not measured by {claim['notebook']}")
        elif holds[claim_id] != "True" and profile() in claim["profiles"]:
            problems.append(f"claim {claim_id} fails")
    return rows, problems


def _read_yaml() -> dict:
    if not CLAIMS.is_file():
        raise FileNotFoundError(
            f"there is no {CLAIMS}: the notebooks and their claims are no part of the installed package; run this in a "
            "checkout of the repository"
        )
    return yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))


def _holds(claim: dict, measured: float | str) -> bool:
    if "at_least" in claim:
        return measured >= claim["at_least"]
    if "at_most" in claim:
        return measured <= claim["at_most"]
    if isinstance(measured, str) or isinstance(claim["equals"], str):
        return measured == claim["equals"]
    return abs(measured - claim["equals"]) <= claim["tolerance"]


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame(columns=COLUMNS)


def _update(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Replaces a claims table in one step; notebooks may run at the same time."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(LOCK):
        rows = change(_read_csv(figures_dir() / name))
        save_csv(rows.sort_values("id")[COLUMNS], figures_dir() / name)

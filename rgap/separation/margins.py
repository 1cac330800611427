"""Units and equations beyond a mere count that the attack on a batch asks for, and its prediction goes by (ours)."""

SPARE = 4
"""Units that the first fully connected layer must have beyond the ranks of its gradient and of the next one: with none
to spare every mixture of the images passes both tests of the search."""

SURPLUS = 8
"""Equations beyond the unknowns that a certificate of virtual constraints needs."""

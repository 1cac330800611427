# The same two commands in a container: docker build -t rgap . && docker run --rm rgap make figures   (or: make test)
# Written for evaluators, not built or run by the developers.
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /rgap
COPY requirements.txt pyproject.toml Makefile README.md LICENSE ./
COPY rgap rgap
RUN make env
COPY . .
# The folder is newer than the environment now, which is complete all the same.
RUN touch .venv/.installed
ENV OMP_NUM_THREADS=1
CMD ["make", "figures"]

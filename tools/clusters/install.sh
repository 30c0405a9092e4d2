#!/bin/sh
# Install SLURM, munge and Open MPI (Debian, Ubuntu), for `nox -s clusters`. Needs root.
set -e
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
    slurm-wlm munge openmpi-bin libopenmpi-dev

#!/usr/bin/env bash
# Lints workflows, scripts, Dockerfile and SkyPilot's file with what is installed of shellcheck and of
# packaging/requirements-lint.txt; --all: what is missing is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
all=${1:-}
missing=() failed=()

lint() { # program, arguments
  if ! command -v "$1" >/dev/null; then
    missing+=("$1")
  elif "$@"; then
    echo "ok       $1"
  else
    failed+=("$1")
  fi
}

lint actionlint .github/workflows/*.yml
lint yamllint --strict --config-file packaging/yamllint.yaml .github/workflows packaging
lint hadolint packaging/Dockerfile
lint shellcheck .ci/run .ci/gpu packaging/*.sh packaging/slurm.sbatch

# SkyPilot reads the file as it would before a launch.
if python3 -c 'import sky' 2>/dev/null; then
  if python3 -c 'import sky; sky.Task.from_yaml("packaging/skypilot.yaml")'; then
    echo "ok       skypilot"
  else
    failed+=(skypilot)
  fi
else
  missing+=(skypilot)
fi

if [ ${#missing[@]} -gt 0 ]; then echo "MISSING  ${missing[*]}"; fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED   ${failed[*]}"
  exit 1
fi
if [ "$all" = --all ] && [ ${#missing[@]} -gt 0 ]; then exit 1; fi

"""Every developer verb. ``python -m nox --list`` shows them; what they do is in tools/, which works without nox too."""

import os
import sys

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["tests"]
# Where this is set, each of the many processes below would compile all packages anew; at a user's, pip has done that.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
nox.options.default_venv_backend = "none"  # the sessions share .nox/dev, which environment() makes


def environment(session: nox.Session, *groups: str, at: str = ".nox/dev") -> str:
    """Have an environment with the packages, editable, and these dependency groups; return its Python."""
    session.run(sys.executable, "-m", "tools.environment", "--at", at, *groups, external=True)
    scripts = os.path.abspath(os.path.join(at, "Scripts" if os.name == "nt" else "bin"))
    session.env["PATH"] = scripts + os.pathsep + os.environ["PATH"]
    return os.path.join(scripts, "python")


@nox.session
def demo(session: nox.Session) -> None:
    """Train on handwritten digits and write a report; run again to resume. [-- --devices 2 --accelerator cuda ...]."""
    python = environment(session, "demo")
    session.run(python, "docs/examples/digits.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Train the worked examples, those with a loop of their own too; missing a score is an error. [-- NAME ...]."""
    python = environment(session, "demo")
    session.run(python, "-m", "tools.examples", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every package's tests and those that need several packages; the slow ones are in `full`."""
    python = environment(session, "test")
    where = session.posargs or ["packages", "integration_tests", "tools"]
    # Two processes; one thread each, or torch's threads fight for the same cores.
    args = ["-n", "2", "--dist", "loadfile", "-m", "not slow", *where]
    session.run(python, "-m", "pytest", *args, env={"OMP_NUM_THREADS": "1"})


@nox.session
def alone(session: nox.Session) -> None:
    """Install each package with nothing but its declared needs; run its tests and its README. [-- --whole NAME ...]."""
    python = environment(session)
    session.run(python, "-m", "tools.alone", *session.posargs)


@nox.session
def loggers(session: nox.Session) -> None:
    """Install Weights & Biases, MLflow and Comet and test the loggers on them: offline, or with a server of its own."""
    python = environment(session, "test", "loggers", at=".nox/loggers")
    where = session.posargs or ["packages/fulmen-loggers", "integration_tests/test_service_loggers.py"]
    session.run(python, "-m", "pytest", "-m", "slow or not slow", *where, env={"OMP_NUM_THREADS": "1"})


@nox.session
def export(session: nox.Session) -> None:
    """Install onnx, onnxscript and onnxruntime and test the exporters on them; compiles C++ too."""
    python = environment(session, "test", "export", at=".nox/export")
    where = session.posargs or ["packages/fulmen-export", "integration_tests/test_module_exports.py"]
    session.run(python, "-m", "pytest", "-m", "slow or not slow", *where, env={"OMP_NUM_THREADS": "1"})


@nox.session
def downstream(session: nox.Session) -> None:
    """Install libraries that build on Lightning, train each on Lightning and on fulmen, and compare. [-- NAME ...]."""
    python = environment(session, "test")
    session.run(python, "-m", "tools.downstream", *session.posargs)


@nox.session
def quantized(session: nox.Session) -> None:
    """Install torchao and bitsandbytes and test float8 and quantized precision on them, on the CPU."""
    python = environment(session, "test", "quantized", at=".nox/quantized")
    where = session.posargs or ["packages/fulmen-precision", "integration_tests/test_quantized_training.py"]
    session.run(python, "-m", "pytest", "-m", "slow or not slow", *where, env={"OMP_NUM_THREADS": "1"})


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Install DeepSpeed, build its operators once, and train, save, resume and consolidate with it on the CPU."""
    python = environment(session, "test", at=".nox/deepspeed")
    session.run(python, "-m", "tools.deepspeed_session", *session.posargs)


@nox.session
def xla(session: nox.Session) -> None:
    """Install torch-xla with its own torch and test fulmen-xla on its CPU runtime: one device, and four as one."""
    session.run(sys.executable, "-m", "tools.xla", *session.posargs, external=True)


@nox.session
def oldest(session: nox.Session) -> None:
    """Test what calls torch's private functions on the oldest torch that the packages take. [-- TESTS ...]."""
    session.run(sys.executable, "-m", "tools.oldest", *session.posargs, external=True)


@nox.session
def clusters(session: nox.Session) -> None:
    """Install SLURM and Open MPI (as root, on Debian or Ubuntu), start one node, test on them, and on several hosts."""
    python = environment(session, "test", "clusters", at=".nox/clusters")
    session.run("tools/clusters/install.sh", external=True)
    session.run("tools/clusters/slurm_up.sh", external=True)
    # Hydra wants an older omegaconf than the command line's tests.
    session.run(python, "-m", "pip", "install", "--quiet", "hydra-core")
    where = ["integration_tests/test_real_clusters.py", "integration_tests/test_hydra_ranks.py"]
    where.append("integration_tests/test_hosts.py")  # network namespaces
    session.run(python, "-m", "pytest", "-rs", *where, *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """Check the packages with mypy and pyright, both strict."""
    python = environment(session, "test", "types")
    session.run(python, "-m", "tools.check_types", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff. [-- --fix]."""
    python = environment(session, "lint")
    fix = "--fix" in session.posargs
    session.run(python, "-m", "ruff", "check", *(["--fix"] if fix else []), ".")
    session.run(python, "-m", "ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def layers(session: nox.Session) -> None:
    """Check which package imports which, that the protocols import no torch, and that there is no import cycle."""
    python = environment(session, "layers")
    session.run(python, "-m", "tools.check_layers")


@nox.session
def api(session: nox.Session) -> None:
    """Compare each package's public API with its api.txt. [-- --write] accepts the changes."""
    python = environment(session, "api")
    session.run(python, "-m", "tools.api", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into build/site, every warning an error, and run the Python blocks of every page and README."""
    python = environment(session, "docs", "test")
    session.run(python, "-m", "tools.docs")
    session.run(python, "-m", "pytest", "tools/test_readme.py", "-n", "2")


@nox.session
def features(session: nox.Session) -> None:
    """Rebuild the last column of docs/features.md; an item without a test or a reason is an error. [-- --check]."""
    python = environment(session)
    session.run(python, "-m", "tools.features", *session.posargs)


@nox.session
def changes(session: nox.Session) -> None:
    """Check that each package tells what changed: a fragment in changes/, readable by towncrier."""
    python = environment(session)
    session.run(python, "-m", "tools.changes")


@nox.session
def build(session: nox.Session) -> None:
    """Build a wheel of every package into dist/."""
    python = environment(session)
    session.run(python, "-m", "tools.wheels")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against raw PyTorch: overhead of a step, import, start-up, memory. [-- step_overhead --markdown ...]."""
    python = environment(session, "test")
    session.run(python, "-m", "tools.bench", *session.posargs)


@nox.session
def drills(session: nox.Session) -> None:
    """Kill saves, damage files, break storages many times over; print a table. [-- NAME COUNT, or full --resume]."""
    python = environment(session, "test")
    session.run(python, "-m", "tools.drills", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def full(session: nox.Session) -> None:
    """Run everything that takes long too: slow tests, demo, benchmarks, docs; ends with a table."""
    python = environment(session, "test", "docs", "types", "lint", "layers", "api")
    session.run(python, "-m", "tools.full", *session.posargs)

"""Everything this repository can do to itself: `nox --list` names it, `nox` runs the checks."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip honours the machine's own pip settings
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests", "build"]

ROOT = Path(__file__).parent
CONSTRAINTS = str(ROOT / "constraints.txt")
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
# Packages with a base and data of their own, and what makes their demo a short one.
DEMOS = {
    "sam2-lora": ("--steps", "2"),
    "sam3-lora": ("--epochs", "1"),
    "scenesplat-lora": ("--epochs", "1"),
    "midi3d-lora": ("--epochs", "1"),
    "isaac-lora": ("--epochs", "1"),
}
# Name of the results in docs/benchmarks -> the program in tools/bench, and its words.
BENCHMARKS = {
    "linear": "linear.py",
    "linear_warm": "linear.py",
    "linear_threads": f"linear.py --threads {os.cpu_count()}",
    "linear_small": (
        "linear.py --dtype fp32 --rounds 500 --shapes 8x256-256,8 64x256-256,8 256x256-256,8 "
        "8x1024-1024,8 64x1024-1024,8"
    ),
    "layers": "layers.py",
    "merging": "merging.py",
    "startup": "startup.py",
    "step_sam2": "step.py sam2",
    "step_sam3": "step.py sam3",
    "step_scenesplat": "step.py scenesplat",
    "step_midi3d": "step.py midi3d",
    "step_isaac": "step.py isaac",
    "cached": "cached.py",
    "input": "input.py",
    "scenesplat_convolution": "scenesplat_convolution.py",
    "scenesplat_scale": "scenesplat_scale.py --picture docs/scenesplat_scale.png",
    "midi3d_operations": "midi3d_cache.py --flops",
    "midi3d_cache": "midi3d_cache.py",
    "midi3d_memory": "midi3d_memory.py",
    "midi3d_extraction": "midi3d_extraction.py",
    "isaac_logits": "isaac_memory.py --logits",
    "isaac_memory": "isaac_memory.py --layers 2 --tokens 1024",
    "isaac_operations": "isaac_cache.py --flops",
    "isaac_cache": "isaac_cache.py --side 16 --layers 1 --tower_layers 1",
    "guards": "guards.py",
    "guards_256": "guards.py --image_size 256 --batch_size 2",
}
# What makes glibc keep freed arrays for the next ones, so that no page is new.
REUSED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
OLDEST = ("torch==2.9.*", "transformers==5.15.0", "accelerate==1.10.0", "peft==0.19.0")


def install(session: nox.Session, *what: str, constrained: bool = True) -> None:
    """Install, with the pinned versions: unconstrained, pip takes gigabytes of CUDA builds."""
    session.install(*(("-c", CONSTRAINTS) if constrained else ()), *what)


def test_requirements(*packages: str) -> list[str]:
    """What the tests of these packages need beside the packages themselves."""
    needs: set[str] = set()
    for package in packages:
        project = nox.project.load_toml(ROOT / "packages" / package / "pyproject.toml")
        needs.update(nox.project.dependency_groups(project, "test"))
    return sorted(needs)


def demo_extra(package: str) -> str:
    """What to install a package with for its demo: `[demo]`, if it has that."""
    project = nox.project.load_toml(ROOT / "packages" / package / "pyproject.toml")["project"]
    return "[demo]" if "demo" in project.get("optional-dependencies", {}) else ""


def editable() -> list[str]:
    """Arguments that install every package from its source folder."""
    return [word for package in PACKAGES for word in ("-e", f"packages/{package}")]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, who may import whom; what in docs/ is made from tests and measurements."""
    install(session, "ruff", "mypy", "types-PyYAML", "torch", "numpy", "pillow", "packaging")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", *(f"packages/{package}/src" for package in PACKAGES))
    session.run("python", "tools/imports.py")
    session.run("python", "tools/faults.py", "--check")
    session.run("python", "tools/bench/page.py", "--check")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of all packages in one environment; arguments go to pytest."""
    install(session, *editable(), *test_requirements(*PACKAGES))
    session.run("pytest", "--durations=5", *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """The long tests of what must never be lost: kills, resumes, memory, many processes."""
    install(session, *editable(), *test_requirements(*PACKAGES))
    session.run("pytest", "-m", "slow and not gpu", "--durations=10", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel of each package, install the wheels alone, run them."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    install(session, "build")
    for package in PACKAGES:
        session.run(
            "python", "-m", "build", "--outdir", str(dist), f"packages/{package}",
            env={"PIP_CONSTRAINT": CONSTRAINTS}, silent=True,
        )  # fmt: skip
    wheels = sorted(dist.glob("*.whl"))
    for wheel in wheels:
        refuse_local_requirements(session, wheel)
    clean = session.create_tmp()
    session.run("python", "-m", "venv", f"{clean}/venv")
    binaries = Path(clean) / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(binaries / "python")
    named = {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in wheels}
    what = [f"{wheel}{demo_extra(package)}" for package, wheel in named.items()]
    session.run(python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, *what, external=True)
    for package in PACKAGES:
        command = binaries / package
        if command.exists():
            session.run(str(command), "--help", external=True, silent=True)
        if package in DEMOS:
            words = [*DEMOS[package], "--output", f"{clean}/{package}", "--overwrite"]
            session.run(str(command), "demo", *words, external=True, silent=True)


def refuse_local_requirements(session: nox.Session, wheel: Path) -> None:
    """A wheel that names a folder of the building machine must never reach an index."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        if b"@ file:" in archive.read(name):
            session.error(f"{wheel.name} requires a local folder: build it from its sdist")


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def alone(session: nox.Session, package: str) -> None:
    """A user's install of one package, and its own tests: are its dependencies declared?"""
    install(session, f"./packages/{package}", *test_requirements(package))
    session.run("pytest", f"packages/{package}", *session.posargs)


@nox.session
def train(session: nox.Session) -> None:
    """The main job: base -> LoRA -> merged (`-- sam3-lora` names the package; default: all)."""
    packages, words = session.posargs[:1] or list(DEMOS), session.posargs[1:]
    for package in packages:
        if package not in DEMOS:
            session.error(f"{package!r} has no demo; there are {', '.join(DEMOS)}")
        install(session, f"./packages/{package}{demo_extra(package)}")
        session.run(package, "demo", "--output", f"demo_run/{package}", "--overwrite", *words)


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory of LoRA against the frozen layer, full fine-tuning and PEFT.

    All of BENCHMARKS, or those that begin with the given words: `nox -s bench -- step`.
    """
    install(session, *editable(), "peft", "matplotlib")
    # A rival to compare with; its CPU build exists for some systems only.
    session.install("-c", CONSTRAINTS, "spconv", success_codes=[0, 1])
    asked = session.posargs or list(BENCHMARKS)
    chosen = [name for name in BENCHMARKS if any(name.startswith(word) for word in asked)]
    for word in asked:
        if not any(name.startswith(word) for name in chosen):
            session.error(f"no benchmark begins with {word!r}: there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        program, *words = BENCHMARKS[name].split()
        threads = words[words.index("--threads") + 1] if "--threads" in words else "1"
        env = {"OMP_NUM_THREADS": threads, **(REUSED_MEMORY if name.endswith("_warm") else {})}
        results = ["--json", f"docs/benchmarks/{name}.json"]
        session.run("python", f"tools/bench/{program}", *words, *results, env=env)
    session.run("python", "tools/bench/page.py")


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need CUDA; install a CUDA build of the pinned torch first."""
    install(session, *editable(), *test_requirements(*PACKAGES))
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests with the oldest versions that the packages declare."""
    install(session, *editable(), *test_requirements(*PACKAGES), *OLDEST, constrained=False)
    session.run("pytest", *session.posargs)

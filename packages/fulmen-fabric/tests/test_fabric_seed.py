"""Seeds and random states against the generators themselves."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from fulmen_fabric import (
    collect_rng_state,
    isolate_rng,
    reset_seed,
    restore_rng_state,
    seed_everything,
)


@pytest.fixture(autouse=True)
def _no_seed(monkeypatch):
    # set first, so that what the code under test writes is undone as well
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def draw():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item(), random.gauss(0, 1)


@pytest.mark.proves("13.12")
def test_one_seed_fixes_python_numpy_and_torch():
    assert seed_everything(7, verbose=False) == 7
    first = draw()
    seed_everything(7, verbose=False)
    assert draw() == first
    seed_everything(8, verbose=False)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.proves("13.12")
def test_the_seed_is_that_of_plain_pytorch():
    seed_everything(3, verbose=False)
    ours = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(ours, torch.rand(4))


def test_child_processes_can_read_the_seed():
    seed_everything(5, workers=True, verbose=False)
    assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert os.environ["PL_SEED_WORKERS"] == "1"


@pytest.mark.proves("13.12")
def test_without_a_seed_the_environment_decides(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert seed_everything(verbose=False) == 11


@pytest.mark.proves("13.12")
def test_without_any_seed_it_is_zero_with_a_warning():
    with pytest.warns(UserWarning, match="using 0"):
        assert seed_everything(verbose=False) == 0


@pytest.mark.proves("13.12")
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="out of range"):
        seed_everything(seed)


def test_a_seed_that_is_no_number_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="seed='x'"):
        seed_everything("x")
    monkeypatch.setenv("PL_GLOBAL_SEED", "many")
    with pytest.raises(ValueError, match="PL_GLOBAL_SEED='many'"):
        seed_everything()


def test_reset_does_nothing_without_a_global_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    reset_seed()
    assert torch.equal(torch.get_rng_state(), before)


def test_reset_returns_to_the_global_seed():
    seed_everything(4, verbose=False)
    first = draw()
    reset_seed()
    assert draw() == first


def test_a_state_survives_a_weights_only_file(tmp_path):
    seed_everything(1, verbose=False)
    random.gauss(0, 1)  # leaves a second value waiting in both generators
    np.random.randn()
    torch.save(collect_rng_state(), tmp_path / "rng.pt")
    expected = [draw() for _ in range(3)]
    restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_state_is_not_changed_by_later_draws():
    state = collect_rng_state()
    expected = draw()
    draw()
    restore_rng_state(state)
    assert draw() == expected


def test_isolation_hides_draws_and_errors():
    seed_everything(2, verbose=False)
    expected = draw()
    seed_everything(2, verbose=False)

    def fail():
        with isolate_rng():
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draw() == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_cuda_generator_is_part_of_the_state(tmp_path):
    torch.rand(1, device="cuda")
    torch.save(collect_rng_state(), tmp_path / "rng.pt")
    expected = torch.rand(3, device="cuda")
    restore_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    with isolate_rng():
        torch.rand(5, device="cuda")


def test_workers_may_be_seeded_by_sample_and_nothing_else_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(3, workers="samples", verbose=False)
    assert os.environ["PL_SEED_WORKERS"] == "samples"
    reset_seed()
    assert os.environ["PL_SEED_WORKERS"] == "samples", "every rank keeps what was asked for"
    with pytest.raises(ValueError, match=r"workers='sample'. Use True, False or 'samples'"):
        seed_everything(3, workers="sample", verbose=False)  # type: ignore[arg-type]  # what is refused

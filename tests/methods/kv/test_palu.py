"""Palu: full rank loses nothing, rank is memory, and the bases are the best ones of their text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kv_rig import BLOCK, answer, bits, build_engine, request, run, same, text_of, tiny_files, tokens
from tokenloom.calibrate_cli import calibrate_app
from tokenloom.errors import RequestError
from tokenloom.methods.kv import combine
from tokenloom.methods.kv.palu_calibration import calibrate
from tokenloom.models.loader import ModelFiles

PROMPT = text_of(1, 90)
TEXT = Path(__file__)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFiles]:
    """A model that has been calibrated, for one group of its two kv heads and for two."""
    before = os.environ.get("TOKENLOOM_HOME")
    os.environ["TOKENLOOM_HOME"] = str(tmp_path_factory.mktemp("home"))
    found = tiny_files(tmp_path_factory.mktemp("llama"))
    calibrate(build_engine(found), TEXT, num_passages=2, tokens=300, groups=(1, 2))
    yield found
    if before is None:
        del os.environ["TOKENLOOM_HOME"]
    else:
        os.environ["TOKENLOOM_HOME"] = before


@pytest.mark.parametrize("spec", ["palu(ratio=1.0)", "palu(ratio=1.0, groups=2)"])
def test_full_rank_is_dense(files: ModelFiles, spec: str) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    dense, full = (answer(engine, PROMPT, kv, max_tokens=40) for kv in ("", spec))
    same(full, dense, tolerance=1e-3)
    assert bits(full) != bits(dense)  # it was stored and read back


def test_a_residual_that_holds_everything_costs_no_bit(files: ModelFiles) -> None:
    engine = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    other = text_of(6, 50)
    alone = [answer(engine, PROMPT), answer(engine, other)]
    both = run(engine, request(PROMPT, "palu(residual=200)", "a"), request(other, "", "b"))
    assert [bits(o) for o in both] == [bits(o) for o in alone]


def test_a_smaller_rank_is_less_memory_and_more_error(files: ModelFiles) -> None:
    engine = build_engine(files, cache__prefix_caching=False)
    used, found = [], []
    for ratio in (1.0, 0.75, 0.25):
        engine.add(request(PROMPT, f"palu(ratio={ratio})"))
        engine.step()
        cached = engine.scheduler.running[0].cached
        assert cached is not None and cached.packed is not None
        keys = torch.empty(cached.packed.length, 2, 16, dtype=torch.float64)
        values = torch.empty_like(keys)
        cached.packed.decode(1, keys, values)
        found.append(values)
        used.append(len(cached.packed.blocks))
        engine.abort("r")
    # 88 tokens of 32 numbers in 4-token blocks: 22 at full rank.
    assert used == [22, 17, 6] and BLOCK == 4
    off = [float((values - found[0]).norm() / found[0].norm()) for values in found]
    assert 0 == off[0] < off[1] < off[2] < 1


def test_bases_are_orthonormal_and_the_first_hold_the_most(files: ModelFiles) -> None:
    _, moments = calibrate(build_engine(files), TEXT, num_passages=1, tokens=300, groups=(1, 2))
    for groups in (1, 2):
        bases = moments.bases(groups)
        size = 32 // groups
        assert bases.shape == (2, 3, groups, size, size)
        eye = torch.eye(size, dtype=torch.float64).expand_as(bases)
        torch.testing.assert_close(bases.transpose(-1, -2) @ bases, eye)
    sums, first = moments.sums, moments.bases(1)[:, :, 0, :, :8]
    held = (first.transpose(-1, -2) @ sums @ first).diagonal(dim1=-1, dim2=-2).sum(-1)
    total = sums.diagonal(dim1=-1, dim2=-2).sum(-1)
    torch.testing.assert_close(held / total, moments.kept(0.25))
    random = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64)).Q
    assert (held > 1.2 * (random.t() @ sums @ random).diagonal(dim1=-1, dim2=-2).sum(-1)).all()


def test_preempted_and_forked_answers_stay_the_same(files: ModelFiles) -> None:
    spec = "palu(ratio=0.5)"
    roomy = build_engine(files, cache__prefix_caching=False, model__backend="reference")
    expected = [tokens(answer(roomy, text_of(i, 60), spec, max_tokens=30)) for i in range(4)]
    tight = build_engine(
        files,
        cache__prefix_caching=False,
        model__backend="reference",
        cache__kv_bytes=3 * 2 * 2 * 16 * 8 * BLOCK * 34,
    )
    outputs = run(tight, *(request(text_of(i, 60), spec, str(i), max_tokens=30) for i in range(4)))
    assert [tokens(o) for o in outputs] == expected
    assert tight.scheduler.num_preemptions > 0
    options = {"temperature": 1.5, "seed": 3, "max_tokens": 30}
    three = tokens(answer(roomy, PROMPT, spec, n=3, **options))
    assert tokens(answer(roomy, PROMPT, spec, **options))[0] == three[0]
    assert len({tuple(choice) for choice in three}) == 3


def test_what_it_needs_and_cannot_do_is_said(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec, message in {
        "palu(ratio=0)": "ratio must be a number|ratio must be above 0",
        "palu(ratio=1.5)": "ratio must be above 0 and at most 1, not 1.5",
        "palu(groups=0)": "groups must be at least 1",
        "snapkv+palu": "at which position each key stood",
    }.items():
        with pytest.raises(RequestError, match=message):
            combine(spec)
    engine = build_engine(files)
    with pytest.raises(RequestError, match="groups is 3; 2 kv heads cannot be split so"):
        engine.add(request(PROMPT, "palu(groups=3)"))
    calibrate(engine, TEXT, num_passages=1, tokens=300)
    with pytest.raises(RequestError, match="run tokenloom calibrate palu --groups 2"):
        engine.add(request(PROMPT, "palu(groups=2)"))
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    with pytest.raises(RequestError, match="run tokenloom calibrate palu"):
        engine.add(request(PROMPT, "palu"))


def test_the_command_calibrates_a_model(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENLOOM_HOME", str(tmp_path))
    command = ["palu", "--model", str(files.path), "--text", str(TEXT), "--tokens", "128"]
    result = CliRunner().invoke(calibrate_app, [*command, "--groups", "2"])
    assert result.exit_code == 0, result.output
    assert "50% of the rank holds" in result.output and "measured.safetensors" in result.output
    assert len(tokens(answer(build_engine(files), PROMPT, "palu(groups=2)"))[0]) == 12
    refused = CliRunner().invoke(calibrate_app, [*command, "--groups", "3"])
    assert refused.exit_code != 0 and "cannot be split into 3" in str(refused.exception)

"""How long a plan says that the certificate will take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.codec import Json
from forge.ship.expected import expected_certificate
from forge.store.artifacts import Facts, Request, Store
from forge.store.digest import digest
from tests.test_verify_maths import _file, _measurement


def _kept(store: Store, parameters: int, seconds: float, **changes: Json) -> None:
    """A certificate of a q8_0 file of so many parameters that took so long."""
    facts: Facts = {**_measurement(), "file": _file(type="q8_0", bytes=parameters * 17 // 16), **changes}
    request: Request = {"stage": "verify", "parameters": parameters, "seconds": seconds}
    artifact = store.build("verify", digest(request), request, lambda out: facts)
    manifest = artifact.path / "artifact.json"
    manifest.chmod(0o644)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "seconds": seconds}))


@pytest.mark.parametrize(("parameters", "seconds"), [(134_515_008, 22.4), (494_000_000, 62.9)])
def test_without_an_earlier_one_parameters_and_cores_say(
    parameters: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tenth of what bench/results has of two cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    expected = expected_certificate(Store(tmp_path), parameters)
    assert not expected.measured
    assert expected.seconds == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(
    ("parameters", "seconds"),
    [(10**9, 100.0), (2 * 10**9, 200.0), (6 * 10**8, 100.0), (10**8, 30.0), (10**7, 30.0)],
)
def test_the_nearest_in_size_says_and_a_larger_one_takes_longer(
    parameters: int, seconds: float, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    _kept(store, 10**9, 90.0)
    _kept(store, 10**9, 100.0)
    _kept(store, 10**8, 30.0)
    _kept(store, parameters, 1.0, legs={})  # of another version
    expected = expected_certificate(store, parameters)
    assert expected.measured and expected.seconds == pytest.approx(seconds, rel=1e-6)
    assert expected_certificate(Store(tmp_path / "empty"), parameters).measured is False

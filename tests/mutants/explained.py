"""Survivors that no quick test can or should kill, and why: path, line that is changed, change -> reason."""

from __future__ import annotations

from collections.abc import Mapping

_CALIBRATE = "forge/verify/calibrate.py"
EXPLAINED: Mapping[tuple[str, str, str], str] = {
    (
        _CALIBRATE,
        "shutil.rmtree(left)  # of a type that was being tried when the search was killed",
        "shutil.rmtree(left) → pass",
    ): "frees the disk earlier; the whole directory is removed at the end",
    (_CALIBRATE, "f16.parent.mkdir()", "f16.parent.mkdir() → pass"): "the export makes the directory",
    (
        _CALIBRATE,
        "write_text(made, json.dumps(to_plain(importance)))",
        "write_text(made, json.dumps(to_plain(importance))) → pass",
    ): "only a search that is stopped reads it: the matrix is then made again, and is the same",
    (
        _CALIBRATE,
        "write_text(self._kept, whole)",
        "write_text(self._kept, whole) → pass",
    ): "a line that was cut matters when the search is stopped a second time: a type is then measured again",
}

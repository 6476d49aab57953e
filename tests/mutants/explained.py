"""Survivors that no quick test can or should kill, and why: path, line that is changed, change -> reason."""

from __future__ import annotations

from collections.abc import Mapping

_CALIBRATE, _REFERENCE, _SERVED = (f"forge/verify/{name}.py" for name in ("calibrate", "reference", "served"))
_VOCABULARY, _SESSION, _TUNED = (f"forge/verify/{name}.py" for name in ("vocabulary", "session", "tuned"))
_MEMORY = "only memory, which the worker gives back when its task ends"
_OF_THIS_CALL = "the model is made for this call and used no more"
_DISK = "frees the disk earlier; the whole directory is removed at the end"
# Of a call that stands on a line of its own.
_DELETED: Mapping[tuple[str, str], str] = {
    (_CALIBRATE, "f16.parent.mkdir()"): "the export makes the directory",
    (_CALIBRATE, "write_text(made, json.dumps(to_plain(importance)))"): "only a search that is stopped reads "
    "it: the matrix is then made again, and is the same",
    (_CALIBRATE, "write_text(self._kept, whole)"): "a line that was cut matters when the search is stopped a "
    "second time: a type is then measured again",
    ("forge/verify/measure.py", 'kept.forget(_named(drawn, "reference"))'): _DISK,
    (_REFERENCE, "hook.remove()"): _OF_THIS_CALL,
    (_REFERENCE, "module._parameters.update(kept)"): "only memory, which `python -m bench verify` holds to a "
    "limit: weights go behind their layer",
    (
        _REFERENCE,
        "unread.update(_replaced(model) if opened.layers else ())",
    ): "only memory and time: the base's tensor is read beside the adapter's, which runs instead",
    (_SERVED, "self.close()"): _MEMORY,
    (_SERVED, "llama_cpp.llama_free(self._context)"): _MEMORY,
    (_SERVED, "llama_cpp.llama_model_free(self._model)"): _MEMORY,
    (_SERVED, "llama_cpp.llama_batch_free(batch)"): _MEMORY,
    (_SERVED, "model.close()"): _MEMORY,
    (_VOCABULARY, "served.close()"): _MEMORY,
    (_SESSION, "self.kept.forget(vendor.parent.name)"): _DISK,
    (_TUNED, 'warnings.simplefilter("ignore", UserWarning)'): "hides what peft says of what is wanted here; "
    "the tests ignore it too",
}
EXPLAINED: Mapping[tuple[str, str, str], str] = {
    **{(path, line, f"{line} → pass"): reason for (path, line), reason in _DELETED.items()},
    (
        _CALIBRATE,
        "shutil.rmtree(left)  # of a type that was being tried when the search was killed",
        "shutil.rmtree(left) → pass",
    ): _DISK,
    (_CALIBRATE, "threads=request.threads,", "threads=request.threads, → (nothing)"): "all cores are used; "
    "the bytes are the same",
    (
        "forge/verify/measure.py",
        "upstream.load_converters(request.converters)  # before anything imports another gguf",
        "upstream.load_converters(request.converters) → pass",
    ): "the order of imports: the tests share a process that has loaded it",
    (
        "forge/stages/deploy.py",
        "endpoint = stack.enter_context(runtime_for(deploy.runtime)(settings, log=self.ship.log))",
        "log=self.ship.log → (nothing)",
    ): "what the server prints, for a person to read",
    ("forge/verify/yardstick.py", "_BLOCK = 1 << 24", "24 → 48"): "how much is read at once",
    (
        "forge/verify/weights.py",
        "_MOST_ROWS = 16384",
        "16384 → 32768",
    ): "only memory: more rows are looked at",
}

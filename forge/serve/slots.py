"""How many requests a server answers at once where nobody says: as many as gain something, and fit.

Not covered: the memory of a GPU.
"""

from __future__ import annotations

from forge.model.estimate import SERVER_START_BYTES, available
from forge.model.gguf_header import GgufHeader, read_gguf
from forge.serve.front_limits import BYTES_OF_LOG_PROBABILITY, most_log_probabilities
from forge.serve.ready import check_kinds
from forge.serve.runtime import MOST_CONTEXT_OF_ALL_SLOTS, ServerSettings

# On a CPU eight at once give a tenth more tokens a second than four, sixteen no more than eight; a
# single client is as fast with any number (docs/decisions.md).
_MOST = 8
# What the server may take of the memory that is free, its model included.
_SHARE = 0.5
_CACHE_BYTES = 2  # f16
# What a long prompt takes while it is read: with a large vocabulary some 300 MB.
_MARGIN_BYTES = 512 << 20


def slots_for(settings: ServerSettings) -> int:
    """Slots for many clients of a model that runs on this machine's CPU.

    Raises `DataError` for files that are not what they are given as.
    """
    header = read_gguf(settings.model)
    check_kinds(settings.model, header, settings.loaded_adapters)
    of_one = max(1, cache_bytes_per_token(header) * settings.context_tokens)
    taken = settings.file_bytes + SERVER_START_BYTES
    room = int(available().free * _SHARE) - taken
    return max(1, min(_MOST, MOST_CONTEXT_OF_ALL_SLOTS // settings.context_tokens, room // of_one))


def memory_bytes(settings: ServerSettings, header: GgufHeader) -> int:
    """What the server needs: the file, the key-value cache of all slots, what a request adds, and itself.

    A limit; what of the file is not in use makes room by itself.
    """
    cache = cache_bytes_per_token(header) * settings.context_tokens * settings.slots
    held = most_log_probabilities(settings.context_tokens) * BYTES_OF_LOG_PROBABILITY
    return settings.file_bytes + cache + SERVER_START_BYTES + max(_MARGIN_BYTES, held)


def cache_bytes_per_token(header: GgufHeader) -> int:
    """What keys and values of one token take in all layers."""

    def fact(key: str) -> int:
        value = header.metadata.get(f"{header.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0

    heads = fact("attention.head_count") or 1
    key_heads = fact("attention.head_count_kv") or heads
    width = fact("attention.key_length") or fact("embedding_length") // heads
    return 2 * _CACHE_BYTES * fact("block_count") * key_heads * width

"""A ChatFormat as a Go template for Ollama's TEMPLATE.

It ranges over `.Messages` only (Ollama sets `.System` beside them: using both writes the system text
twice). Every literal is a quoted Go string, so that braces, quotes and trim markers in it mean
nothing; characters that a Modelfile drops are written as escapes. Conditions ask only for a
message's role and place. https://pkg.go.dev/text/template, Ollama's `template/template.go`.

Not covered: tools, thinking: messages of other roles are left out.
"""

from __future__ import annotations

from forge.chat.format import HELD, ChatFormat, FeatureChoice

# A message's features by its place: user messages stand at 0 or 1, 2 or 3, ... (a system message
# shifts them by one), answers at 1 or 2, 3 or 4, ...; the last message is the user's.
_CONDITIONS = {
    ("user", "first"): "lt $i 2",
    ("user", "last"): "eq (len (slice $.Messages $i)) 1",
    ("assistant", "first"): "lt $i 3",
    ("assistant", "last"): "eq (len (slice $.Messages $i)) 2",
    ("", "first"): "lt (len .Messages) 3",
}
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}


def to_go(chat: ChatFormat, *, add_bos: bool) -> str:
    """The Go template. With `add_bos` the server's tokenizer writes the lead, so it is left out here."""
    roles = ["user", "assistant"]
    if chat.system == "turn":
        roles.insert(0, "system")
    choices = [*(chat.prefix[role] for role in roles), chat.generation]
    asked = {(role, feature) for role in roles for feature in chat.prefix[role].features()}
    lines = [_literal(chat.lead)] if chat.lead and not add_bos else []
    lines += _opening(chat, any("system" in choice.features() for choice in choices))
    numbered = any(feature in ("first", "last") for _, feature in asked)
    lines.append("{{- range $i, $message := .Messages }}" if numbered else "{{- range .Messages }}")
    for number, role in enumerate(roles):
        branch = "else if" if number else "if"
        turn = _choice(chat.prefix[role], role) + "{{ .Content }}" + _text(chat.suffix[role])
        lines.append(f'{{{{- {branch} eq .Role "{role}" }}}}{turn}')
    lines += ["{{- end }}", "{{- end }}" + _choice(chat.generation, "")]
    return "\n".join(lines)


def _opening(chat: ChatFormat, asks_for_system: bool) -> list[str]:
    """Variables: whether there is a system message, and its text where it is written later."""
    declared, noting = "", ""
    if asks_for_system:
        declared, noting = "{{- $system := false }}", "{{ $system = true }}"
    if chat.system == "held":
        declared += '{{- $held := "" }}'
        noting += "{{ $held = .Content }}"
    if not declared:
        return []
    return [declared, '{{- range .Messages }}{{ if eq .Role "system" }}' + noting + "{{ end }}{{ end }}"]


def _choice(choice: FeatureChoice, role: str) -> str:
    if choice.yes is None or choice.no is None:
        return _text(choice.text)
    ending = min(choice.texts(), key=len)
    if ending and all(text.endswith(ending) for text in choice.texts()):
        return _choice(_without(choice, ending), role) + _text(ending)
    asked = "$system" if choice.feature == "system" else _CONDITIONS[role, choice.feature]
    yes, no = _choice(choice.yes, role), _choice(choice.no, role)
    if not yes:
        asked = f"({asked})" if " " in asked else asked
        return f"{{{{ if not {asked} }}}}{no}{{{{ end }}}}"
    return f"{{{{ if {asked} }}}}{yes}" + (f"{{{{ else }}}}{no}" if no else "") + "{{ end }}"


def _without(choice: FeatureChoice, ending: str) -> FeatureChoice:
    if choice.yes is None or choice.no is None:
        return FeatureChoice(choice.text.removesuffix(ending))
    return FeatureChoice("", choice.feature, _without(choice.yes, ending), _without(choice.no, ending))


def _text(text: str) -> str:
    return "{{ $held }}".join(_literal(part) if part else "" for part in text.split(HELD))


def _literal(text: str) -> str:
    return "{{ " + quoted(text) + " }}"


def quoted(text: str) -> str:
    """A Go string literal that Ollama's Modelfile parser leaves as it is."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"

"""Text into HTML. What models, peers and data sets wrote is hostile: nothing of it becomes markup, turns the direction
of reading, or hides."""

import html
import itertools
import math

from cz_jax.errors import one_line

LONG_TEXT = 4000  # characters shown of an answer or a question


def inline(value, limit: int = 80) -> str:
    """`value` escaped for a place on one line or in an attribute, cut in the middle beyond `limit` characters; control
    and bidirectional characters stand as escapes."""
    return html.escape(one_line(str(value), limit))


def block(text: str, limit: int = LONG_TEXT) -> str:
    """`text` escaped for a <pre>, its line breaks kept, cut at `limit` characters with the rest counted; a character
    that does not print stands as its code point."""
    text = text.replace("\r\n", "\n")
    shown = text[:limit]
    parts = []
    for kind, run in itertools.groupby(shown, lambda c: None if c.isprintable() or c in "\n\t" else c):
        if kind is None:
            parts.append(html.escape("".join(run)))
        else:
            count = sum(1 for _ in run)
            times = f" \N{MULTIPLICATION SIGN}{count}" if count > 1 else ""
            parts.append(f'<span class="ctl">U+{ord(kind):04X}{times}</span>')
    if len(text) > limit:
        parts.append(f'<span class="cut">{len(text) - limit:,} more characters</span>')
    return "".join(parts)


def short(digest: str, length: int = 12) -> str:
    """The beginning of a digest or a peer id, the whole of it on hover."""
    if len(digest) <= length:
        return f"<code>{inline(digest)}</code>"
    return f'<code title="{inline(digest, 200)}">{inline(digest[:length])}\N{HORIZONTAL ELLIPSIS}</code>'


def number(value: float | None) -> str:
    """Three significant digits, in few characters."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    size = abs(value)
    if size >= 1e15:
        return f"{value:.2e}".replace("e+", "e")
    if size >= 10_000:
        unit, name = next(u for u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= u[0])
        return f"{value / unit:.3g}{name}".replace("1e+03", "1000")
    if size >= 1000 or value == int(value):
        return f"{value:.0f}"
    if size >= 100:
        return f"{value:.4g}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share 0..1 as whole percent, one decimal below 10%."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value * 100:.1f}%" if 0 < abs(value) < 0.0995 else f"{value * 100:.0f}%"


def seconds(value: float | None) -> str:
    """A duration in its two largest units."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value < 60:
        return f"{number(round(value, 1) if value >= 1 else value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML already; the first of a row is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def card(title: str, body: str, about: str = "") -> str:
    """A titled panel; all arguments are HTML already."""
    told = f'<p class="about">{about}</p>' if about else ""
    return f'<section class="card"><h3>{title}</h3>{told}{body}</section>'

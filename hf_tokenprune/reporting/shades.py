"""Colours for depth: the deeper a token lived, the stronger its colour, in grey as well."""

LIGHT = ((240, 244, 231), (160, 214, 190), (52, 138, 189), (8, 48, 107))
DARK = ((33, 40, 51), (32, 92, 132), (62, 168, 178), (214, 245, 182))
INKS = ((0, 0, 0), (255, 255, 255))


def shades(count: int, *, dark: bool = False) -> list[tuple[str, str]]:
    """`count` colours, shallow to deep, as `(background, ink)` in hex; each ink is the one that can be read better."""
    anchors = DARK if dark else LIGHT
    found = []
    for number in range(count):
        at = number / max(count - 1, 1) * (len(anchors) - 1)
        left = min(int(at), len(anchors) - 2)
        colour = tuple(round(a + (b - a) * (at - left)) for a, b in zip(anchors[left], anchors[left + 1], strict=True))
        found.append((_hex(colour), _hex(max(INKS, key=lambda ink, colour=colour: contrast(ink, colour)))))
    return found


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """How well one colour can be told from the other, 1 to 21, as WCAG counts it."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour):
    parts = [value / 255 for value in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(colour):
    return "#{:02x}{:02x}{:02x}".format(*colour)

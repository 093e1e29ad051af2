"""Pictures of circuits as text: DOT, SVG, and a page that answers questions.

Nothing is needed to make them, and nothing outside them to look at them. Of a circuit of all edges
take some first, ``circuit.top(200)``.
"""

from pahq.drawing.dot import to_dot
from pahq.drawing.html import to_html
from pahq.drawing.svg import to_svg

__all__ = ["to_dot", "to_html", "to_svg"]

"""mkdocs: links from a page to a file of the repository that is no page.

On a code host they open the file. The site has no such files: there the link becomes its own text. A link to a file that does not exist is a warning, which --strict makes an error.
"""

import logging
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)\)")
log = logging.getLogger("mkdocs.hooks.outside_links")


def on_page_markdown(markdown: str, page, **_) -> str:
    """The page's text without those links."""

    def text(link: re.Match) -> str:
        path = (ROOT / "docs" / page.file.src_uri).parent / link[2]
        if not path.exists():
            log.warning("%s: links to %s, which is not there", page.file.src_uri, link[2])
        return link[1]

    return LINK.sub(text, markdown)

"""What building the site does to pages: output of commands is put in, and links to files of code become names."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from typing import Any

from autodeploy.app.cli import main

_COMMAND = re.compile(r"<!-- run: autodeploy (.*) -->")
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    return _LINK.sub(lambda link: _name(folder, link), _COMMAND.sub(_output, markdown))


def _output(command: re.Match[str]) -> str:
    printed = io.StringIO()
    os.environ["COLUMNS"] = "100"
    # --help ends the process.
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(command[1].split())
    return f"```\n$ autodeploy {command[1]}\n{printed.getvalue().rstrip()}\n```"


def _name(folder: str, link: re.Match[str]) -> str:
    """The path of a file that is no page, as text; pages of other folders stay links."""
    path = posixpath.normpath(posixpath.join(folder, link[2]))
    if path.startswith("docs/"):
        return link[0]
    return f"`{path}`"

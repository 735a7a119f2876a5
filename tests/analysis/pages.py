"""Reads a page as a browser would, and checks what every page must be."""

import html.parser
import re
from pathlib import Path


class Reader(html.parser.HTMLParser):
  """Checks nesting and collects tags, attributes and text."""

  def __init__(self):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, *a) for a in attrs]
    if tag not in ("meta", "br", "link", "wbr"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, *a) for a in attrs]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def read(path: Path) -> Reader:
  reader = Reader()
  reader.feed(path.read_text(encoding="utf-8"))
  assert reader.open == []
  return reader


def check_fetches_nothing(path: Path) -> None:
  """No tag, attribute or style through which a page can load something; both colour schemes."""
  reader, text = read(path), path.read_text(encoding="utf-8")
  assert not {"script", "link", "iframe", "img", "object", "embed"} & set(reader.tags)
  for tag, name, value in reader.attributes:
    if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
      assert value.startswith(("#", "data:")), (tag, name, value)
  style = text[text.index("<style>"):text.index("</style>")]
  assert "url(" not in style and "@import" not in style
  assert "prefers-color-scheme: dark" in style
  assert 'name="viewport"' in text


def check_ids(path: Path) -> None:
  """No id twice, and each reference into a picture meets its id."""
  reader = read(path)
  ids = [value for _, name, value in reader.attributes if name == "id"]
  assert len(ids) == len(set(ids))
  wanted = {v[1:] for _, n, v in reader.attributes if n in ("href", "xlink:href") and v[0] == "#"}
  for _, _, value in reader.attributes:
    wanted |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
  assert wanted and wanted <= set(ids)

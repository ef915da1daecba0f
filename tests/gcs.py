"""A server of the little of Google Cloud Storage that tensorstore asks for.

What it stores lies in an fsspec file system, where all else finds it.
"""

import http.server
import json
import re
import threading
import urllib.parse


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"  # Connections are kept.

  def do_GET(self):
    name, options = self._asked()
    system, generations = self.server.system, self.server.generations
    if name is None:
      return self._list(options)
    if not system.isfile(name):
      return self._answer(404)
    data, generation = system.cat_file(name), generations.get(name, 1)
    if options.get("ifGenerationNotMatch") == str(generation):
      return self._answer(304)
    headers = {"x-goog-generation": generation}
    wanted = self.headers.get("Range")
    if wanted is None:
      return self._answer(200, data, headers)
    first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted).groups()
    if not first:
      first, last = max(0, len(data) - int(last)), ""
    part = slice(int(first), int(last) + 1 if last else len(data))
    headers["Content-Range"] = (
      f"bytes {part.start}-{min(part.stop, len(data)) - 1}/{len(data)}"
    )
    return self._answer(206, data[part], headers)

  def do_POST(self):
    data = self.rfile.read(int(self.headers["Content-Length"]))
    _, options = self._asked()
    name = f"/{self._bucket()}/{options['name']}"
    system, generations = self.server.system, self.server.generations
    before = generations.get(name, 1) if system.isfile(name) else 0
    if options.get("ifGenerationMatch", str(before)) != str(before):
      return self._answer(412)
    system.pipe_file(name, data)
    generations[name] = before + 1
    body = {"name": options["name"], "generation": str(before + 1)}
    return self._answer(200, json.dumps(body).encode())

  def do_DELETE(self):
    name, _ = self._asked()
    if not self.server.system.isfile(name):
      return self._answer(404)
    self.server.system.rm_file(name)
    return self._answer(204)

  def log_message(self, *args):
    """Says nothing."""

  def _list(self, options):
    root = f"/{self._bucket()}/"
    names = (n.removeprefix(root) for n in self.server.system.find(root))
    items = [
      {"name": name, "generation": "1"}
      for name in sorted(names)
      if name.startswith(options.get("prefix", ""))
    ]
    return self._answer(200, json.dumps({"items": items}).encode())

  def _bucket(self):
    return re.match(r"(?:/upload)?/storage/v1/b/([^/]+)/o", self.path)[1]

  def _asked(self):
    """The object, if one is named, and the query."""
    url = urllib.parse.urlsplit(self.path)
    found = re.search(r"/o/(.+)$", url.path)
    name = found and f"/{self._bucket()}/{urllib.parse.unquote(found[1])}"
    return name, dict(urllib.parse.parse_qsl(url.query))

  def _answer(self, status, body=b"", headers=()):
    self.send_response(status)
    for key, value in dict(headers).items():
      self.send_header(key, str(value))
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)


def serve(system):
  """Starts a server of a file system; its `server_port` is free."""
  server = http.server.ThreadingHTTPServer(("localhost", 0), _Handler)
  server.system, server.generations = system, {}
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server

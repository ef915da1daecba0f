"""Memory against what a device offers."""

from opd_jax import memory, preflight
from tests.preflight.support import config_of, inspect, only


def test_memory_against_what_a_device_offers(good, monkeypatch):
  config = config_of(good)
  found = inspect(config).figures()["memory"]
  resident, total = found["resident_bytes"], found["total_bytes"]
  for limit, name, words in (
    (total, None, ()),
    (total - 1, "memory_tight", ("batch.micro_batches", "student.remat")),
    (resident - 1, "memory_exceeded", ("mesh.fsdp", "more devices")),
  ):
    monkeypatch.setattr(memory, "device_limit", lambda limit=limit: limit)
    report = inspect(config)
    if name is None:
      assert not report.findings
    else:
      size = preflight.device.size_text(limit)
      only(report, name, f"offers {size}", *words)

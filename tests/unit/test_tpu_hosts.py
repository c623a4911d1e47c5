"""The number of hosts of a TPU, against a metadata server on loopback."""

import http.server
import threading

import pytest

from unimm_jax import distributed, tpu_hosts
from unimm_jax.errors import StartupError


@pytest.fixture
def metadata(monkeypatch):
    """Attributes of a metadata server; the machine has a TPU."""
    attributes = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.rpartition("/")[2]
            known = self.headers["Metadata-Flavor"] == "Google" and key in attributes
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(key, "not found").encode())

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(tpu_hosts, "has_tpu", lambda: True)
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    yield attributes
    server.shutdown()
    server.server_close()


def test_the_hosts_of_a_tpu_vm_come_from_the_metadata_server(metadata):
    assert tpu_hosts.number_of_hosts() == 1  # no such attribute: a single host
    metadata["worker-network-endpoints"] = "unknown:unknown:10.0.0.2"
    assert tpu_hosts.number_of_hosts() == 1
    metadata["worker-network-endpoints"] = ",".join(f"unknown:{i}:10.0.0.{i}" for i in range(4))
    assert tpu_hosts.number_of_hosts() == 4
    metadata["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\n"
    assert tpu_hosts.number_of_hosts() == 8


def test_gke_names_the_hosts_in_the_environment(metadata, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert tpu_hosts.number_of_hosts() == 2
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "3")
    assert tpu_hosts.number_of_hosts() == 6


def test_without_a_tpu_or_a_server_there_is_one_host(metadata, monkeypatch):
    metadata["worker-network-endpoints"] = "a,b"
    monkeypatch.setattr(tpu_hosts, "has_tpu", lambda: False)
    assert tpu_hosts.number_of_hosts() == 1
    monkeypatch.setattr(tpu_hosts, "has_tpu", lambda: True)
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:1")
    assert tpu_hosts.number_of_hosts() == 1


def test_a_process_of_several_hosts_connects_to_the_others(metadata, monkeypatch):
    metadata["worker-network-endpoints"] = "a,b"
    seen = {}

    def initialize(**named):
        seen.update(named)
        raise RuntimeError("no coordinator")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(StartupError, match="2 hosts of a TPU"):
        distributed.start()
    assert "coordinator_address" not in seen and seen["initialization_timeout"] == distributed.START_SECONDS

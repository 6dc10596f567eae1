"""schemathesis against a running server over a tiny model: no 5xx, and nothing that the document leaves out.

    pip install -e '.[dev,system]'
    python tests/system/openapi_fuzz.py [--seconds 120] [--examples 20] [--seed 1]

All routes of /openapi.json are asked with valid, invalid and stateful requests, on loopback, from one client.
A valid request may be refused (two fields may not go together, which no schema says); an invalid one must
be. Ends with schemathesis's own exit status and report.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import schemathesis

# Its own list lacks 413, which is how an array of more items than allowed may end.
CONFIG = """[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429"]
"""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "use_after_free",
)


@schemathesis.hook
def map_query(context: Any, query: Any) -> Any:
    """The feed has no end unless a single snapshot is asked for."""
    if context.operation.path == "/live" and (not isinstance(query, dict) or "interval_s" not in query):
        return {**(query or {}), "once": "true"}
    return query


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Most requests name the model that is served, and ask for few tokens: made-up names all end in a 404."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and random.random() < 0.8:
        body = {**body, "model": "tiny"}
        for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(field), int) and body[field] > 4:
                body[field] = 4
    return body


def main() -> int:
    """Serve, fuzz, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="time limit of the whole run")
    parser.add_argument("--examples", type=int, default=20, help="requests per operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "serve")]
    from tiny_models import build_tiny
    from tuning_server import start

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TOKENLOOM_HOME"] = f"{folder}/home"
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CONFIG)
        server = start(build_tiny(Path(folder))[0], limits__max_tokens=8)
        try:
            command = _command(server.url, config, options)
            return subprocess.run(command, check=False, env=_environment()).returncode
        finally:
            server.stop()


def _command(url: str, config: Path, options: argparse.Namespace) -> list[str]:
    return [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
        *("run", f"{url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--continue-on-failure", "--no-color"),
        *("--max-examples", str(options.examples), "--max-time", str(options.seconds)),
        *("--seed", str(options.seed), "--generation-database", "none", "--request-timeout", "30"),
        *("--warnings", "off", "--suppress-health-check", "all"),
    ]


def _environment() -> dict[str, str]:
    # schemathesis imports this file for the hook above.
    return {
        **os.environ,
        "SCHEMATHESIS_HOOKS": Path(__file__).stem,
        "PYTHONPATH": str(Path(__file__).parent),
    }


if __name__ == "__main__":
    sys.exit(main())

"""A local S3 server that answers real requests, on loopback."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from relex_stream.locations import Url
from relex_stream.objects import objects_at
from relex_stream.store.storage import storage_at

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server, with credentials for it in the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        objects_at.cache_clear()
        storage_at.cache_clear()
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str) -> Url:
    """A new bucket."""
    name = f"bucket-{next(_NUMBERS)}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return Url.parse(f"s3://{name}")


@pytest.fixture
def upload(s3_server: str) -> Callable:
    """A function that copies a directory to a URL."""
    client = boto3.client("s3", endpoint_url=s3_server)

    def copy(directory, url: Url) -> Url:
        name, _, prefix = url.path.partition("/")
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(directory).as_posix()}"
                client.put_object(Bucket=name, Key=key, Body=path.read_bytes())
        return url

    return copy

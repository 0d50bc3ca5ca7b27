"""One server of the sample model, over two stages, for all tests of chat."""

from collections.abc import AsyncIterator, Iterator, Mapping

import httpx
import pytest

from tests.support.chats import Chat
from tests.support.servers import Server, serving

CACHE = ("--max-model-len", "640", "--num-blocks", "40")
"""Room for twice the longest conversation: thirty of them at once have to give way to each other."""


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Mapping[str, str]) -> Iterator[Server]:
    options = ("--stages", "2", "--max-num-seqs", "48", *CACHE)
    with serving(tmp_path_factory.mktemp("chat"), *options, environment=ray_cluster) as started:
        yield started


@pytest.fixture
async def chat(server: Server) -> AsyncIterator[Chat]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as http:
        yield Chat(http)

"""The private Ray of a piece of work."""

import pytest

from cluster.errors import RunFailed
from cluster.ray_session import local_ray


def test_a_ray_that_did_not_start_is_started_again(monkeypatch):
    with local_ray(1):
        import ray

        start = ray.init
    fails = [True, True, False]

    def sometimes(**options):
        start(**options)
        if fails.pop(0):
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", sometimes)
    with local_ray(1) as folder:
        assert ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote()) == 42
    assert not fails
    assert not folder.exists()
    fails += [True] * 3
    with pytest.raises(RunFailed, match="3 times: The current node timed out"), local_ray(1):
        pass
    assert not ray.is_initialized()

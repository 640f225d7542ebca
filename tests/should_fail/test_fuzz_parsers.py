"""Every parser of tests/support/fuzzed.py, fed with damaged documents by hypothesis; the soak does it with atheris."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptfs.errors import CkptfsError
from tests.should_fail.test_fuzz_layers import mutated
from tests.support.fuzzed import TARGETS

EXAMPLES = 100


@pytest.mark.row("M7")
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_ends_with_a_value_or_an_error_of_ours(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.parse(seed)  # an honest document is understood

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds).flatmap(mutated) | st.binary(max_size=300))
    def judge(data: bytes) -> None:
        try:
            target.parse(data)
        except CkptfsError:
            pass

    judge()
    if name == list(TARGETS)[-1]:
        record_property(
            "figure", f"{len(TARGETS)} parsers, {EXAMPLES} damaged documents each, beside those of each sin"
        )

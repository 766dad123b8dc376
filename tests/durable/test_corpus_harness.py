"""The corpus harness has teeth: it notices a re-entry that loses something small."""

import corpus_harness as harness


def differs(module: str, name: str, trip: harness.Trip) -> str | None:
    a, b = harness.load_native(module), harness.load_native(module)
    return harness.difference(a[name], a["LOG"], b[name], b["LOG"], trip)


def test_an_identity_trip_is_no_difference() -> None:
    assert differs("trys", "g_full", lambda g: g) is None


def test_a_generator_that_loses_its_place_is_noticed() -> None:
    def restart(g):
        return harness.load_native("loops")["g_while_else"]()

    assert "native" in (differs("loops", "g_while_else", restart) or "")


def test_a_cleanup_that_runs_too_early_is_noticed() -> None:
    def closes(g):
        g.close()
        return g

    assert differs("trys", "g_finally_normal", closes)


def test_a_failing_trip_is_reported_with_its_error() -> None:
    def fails(g):
        raise TypeError("cannot pickle")

    assert "cannot pickle" in (differs("withs", "g_with", fails) or "")


def test_a_lost_exception_context_is_noticed() -> None:
    """g_context_of_thrown logs the context. describe_error must compare the chains as well."""
    try:
        try:
            raise KeyError("a")
        except KeyError:
            raise ValueError("b")
    except ValueError as error:
        whole = harness.describe_error(error)
        error.__context__ = None
        assert harness.describe_error(error) != whole

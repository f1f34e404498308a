"""Values of the spool."""

from otel_smtp.spool.messages import new_id


def test_ids_are_unique_sorted_by_time_and_safe_in_a_file_name() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == 10_000
    assert ids == sorted(ids)
    assert all((len(one) == 26 and one.isalnum() and one.islower()) or one.isdigit() for one in ids)

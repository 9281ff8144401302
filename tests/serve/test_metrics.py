"""What Prometheus reads."""

from prometheus_client.parser import text_string_to_metric_families


def figures(http):
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if len(sample.labels) == 1}


def test_a_prompt_that_comes_again_is_found_in_the_cache(http, server):
    ask = {"prompt": "The dog sat on the log, and the cat sat on the mat. " * 3, "max_tokens": 2}
    told, usages = [figures(http)], []
    for _ in range(2):
        usages.append(http.post("/v1/completions", json=ask).json()["usage"])
        assert server.idle()
        told.append(figures(http))
    before, between, after = told
    length, cached = usages[1]["prompt_tokens"], usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached == length - 1
    for name, first, second in (
        ("prefix_cache_queries", length, length),
        ("prefix_cache_hits", usages[0]["prompt_tokens_details"]["cached_tokens"], cached),
        ("prompt_tokens", length, length),
        ("generation_tokens", *(usage["completion_tokens"] for usage in usages)),
    ):
        key = f"vllm:{name}_total"
        assert (between[key] - before.get(key, 0), after[key] - between[key]) == (first, second), name
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0

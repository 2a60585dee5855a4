import sys; sys.path.insert(0,"/work/main")
import tests.e2e.test_slo_rules as t
import tests.e2e.processes as p
orig=t.wait_for
def wf(what,look,within_s=20.0):
    if "recorded" in what:
        import time; time.sleep(8)
        ask=look.__closure__[0].cell_contents
        import json
        for q in ("slo:sli_error:increase5m","slo:sli_total:increase5m","llm_requests_total","llm_request_failures_total","llm_time_to_first_token_seconds_count",'llm_time_to_first_token_seconds_bucket{le=~"0.3"}','increase(llm_time_to_first_token_seconds_count[5m])'):
            print(q, ask(q))
    return orig(what,look,within_s)
t.wait_for=wf
def test_x(query): pass
query=t.query

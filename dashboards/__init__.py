"""Grafana dashboards as code, and rules for Prometheus: `python -m dashboards.build` writes dashboards/*.json."""

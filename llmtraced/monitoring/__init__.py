"""For those who watch servers with Prometheus and Grafana: dashboards, rules, pictures."""

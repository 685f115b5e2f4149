"""No clock decides a test: under load an example may take longer than Hypothesis lets it take by itself."""

import hypothesis

hypothesis.settings.register_profile("unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("unhurried")

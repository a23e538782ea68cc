"""RQ's settings, which its worker imports before it forks for a job."""

import shop  # noqa: F401

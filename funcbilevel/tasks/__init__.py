"""One file per task: data, models, problem and metric, on the public API only. They need the extra `tasks`."""

"""Pipeline parallelism: schedules as tables of integers, and the executor that runs them."""

"""Eight simulated CPU devices for every test: set before jax starts."""

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

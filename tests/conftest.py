"""Eight CPU devices for every test, so that meshes are real; set before JAX looks for devices."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

"""The diagonal of the Hessian of the loss, in closed form or by random probes."""

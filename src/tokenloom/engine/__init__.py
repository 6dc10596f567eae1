"""The loop: request, batch, scheduler, runner, sampler, engine."""

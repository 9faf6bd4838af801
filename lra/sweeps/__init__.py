"""Many runs: plan, execution here, on Slurm and on Ray, search, forecasts."""

"""What every floor above stands on: settings, commands, files, processes, ranks, checkpoints."""

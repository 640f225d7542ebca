"""What is in a checkpoint, told from its metadata: values out of files that are read in ranges, few and small.

    source      where the files come from (a directory here, an open image elsewhere)
    container   what the engine wrote: config.dump, spec.dump, status
    processes   what CRIU wrote about each process
    overview    the whole: `inspect`, and the overview in one line that `show` prints
    memory      the pages of processes: reading, searching
    diff        two checkpoints: files, processes, memory
    render      the same for people, on a terminal

Functions return values that have `to_json()`. Keys that checkpointctl has too are called as it calls them. Called by
the command line; blocking calls, made from a worker thread. Nothing is imported here.
"""

"""What is in a checkpoint, told from its metadata: values out of files that are read in ranges, few and small.

    source       where the files come from: the protocol, and a directory
    image_files  the same of an open image, fetching what is read
    parts        what can be asked for, and which images it is read from
    container    what the engine wrote: config.dump, spec.dump, status
    processes    what CRIU wrote about each process
    overview     the whole: `inspect`, and the overview in one line that `show` prints
    memory       the pages of processes: reading, searching
    diff         two checkpoints: processes, memory, files
    image_diff   two open images, told from their chunks (equality, cells) and, where they do not tell, from bytes
    render       the same for people, on a terminal

Functions return values that have `to_json()`. Keys that checkpointctl has too are called as it calls them. Called by
the command line; blocking calls, made from a worker thread. Nothing is imported here.
"""

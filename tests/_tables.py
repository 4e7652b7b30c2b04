"""FER2013's csv, written from a table."""


def write_csv(table, path):
    rows = zip(table.emotion, table.pixels, table.usage)
    path.write_text("emotion,pixels,Usage\n" + "".join(f"{e},{' '.join(map(str, p.ravel()))},{u}\n" for e, p, u in rows))

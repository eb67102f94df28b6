"""Words that say how something is asked, not what about."""

STOP_WORDS = frozenset(
    """a about after again all also am an and any are as at be because been before being best both but by can could did
    do does doing don down each even ever every few find first for from get give go good got had has have having he help
    her here him his how if in into is isn it its just know least less let like ll look made make many may me might more
    most much must my need never new no nor not now of off often on once one only or other our out over own per please
    quite rather re really same say see she should show simple since so some someone something start still such take
    tell than that the their them then there these they thing things this those through thus time tips to today tomorrow
    too two under until up upon us use used using ve very want was way we week weekend well were what when where whether
    which while who why will with without won work would yes yet you your yours yourself
    write explain describe""".split()  # noqa: SIM905
)

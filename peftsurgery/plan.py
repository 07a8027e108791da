from peftsurgery.planning import *  # noqa  (temporary, until every file imports planning)

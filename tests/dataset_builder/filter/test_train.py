import json


def test_x(trained):
    print(json.dumps(trained[1], indent=1))

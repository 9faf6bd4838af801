"""Pathfinder at 32 x 32 pixels: are the two discs on the same contour? Sequences of 1,024 pixels, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lra.task import Protocol
from lra.tasks._pathfinder_task import PathfinderTask, protocols


class Pathfinder(PathfinderTask):
    name = "pathfinder"
    title = "Pathfinder"
    classes = 2
    size = 32
    protocols: ClassVar[Mapping[str, Protocol]] = protocols(
        32,
        {
            "strict": (
                "5dfeca5709b5d74772e09a5ef1bec32e42561b7feafba03c22e758731fb9aeef",
                "d185b91846462128f550d01c86e9325e4089be8b44afd542c6234c6c17c0791f",
                "7149a4080103ea5c65f25f7c2c2a2f92173efa95cb6ef73bd1e96965cdfd8a7a",
            ),
            "strict-contour9": (
                "5edd4fec3fc5374862c92e81cfacf7bb84c73577281def5cea1678a4ae89b686",
                "cd4dab5652a7f7db1b3bcde5e484fcca03de49185a5e178349858f5d1381387a",
                "3ce227c2d2d8a4f7e57545fc1b3d8deb4aabe3db7e2f1555ebb7713f01b3c2bc",
            ),
            "strict-contour6": (
                "5eec0865211888c032e0c6cfaa3a890c37660a74f7d0fb4ad108df266db5b1b3",
                "f8053e7833165e46047a2f30a7f97f77e0bd48ce433517294ec11426c2004c00",
                "a47c8ebce4596b6f1216f677816fc2103370f99fe50e345917f70e18b2fa2c4a",
            ),
            "strict-small": (
                "d1674a029a6facc8c5dc4e01e6bacb6918a588d64a00214950ed33dba4987fc1",
                "db1eb8d4c99ab7443f6d06956d60db332552022babc19d182e9d44a7d2f6ae2d",
                "3f3c75607e2491ab1b45c15fa53fa97721184745203bff2c1cbd7e6f6dcd456d",
            ),
        },
    )

"""The policy pack: `pulumi preview --policy-pack ./policy`. What each rule refuses, and why, is in docs/policies.md."""

import sys
from pathlib import Path

from pulumi_policy import EnforcementLevel, PolicyPack

# However the language host starts the pack, its folder is on the path, and not the one that this folder is in.
sys.path.append(str(Path(__file__).parent.parent))

from policy.rules import POLICIES

PolicyPack(name="private-registry", policies=POLICIES, enforcement_level=EnforcementLevel.MANDATORY)

// The official Kubernetes plugin, as its own main package starts it, which cannot be built from its Go module: what that
// embeds is written by Pulumi's release. The schema and the mapping are the module's own; `build` in programs.py says where.
package main

import (
	_ "embed"

	"github.com/pulumi/pulumi-kubernetes/provider/v4/pkg/provider"
	"github.com/pulumi/pulumi-kubernetes/provider/v4/pkg/version"
)

//go:embed schema.json
var schema []byte

//go:embed terraform-mapping.json
var mapping []byte

func main() {
	provider.Serve("kubernetes", version.Version, schema, mapping)
}

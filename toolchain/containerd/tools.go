//go:build tools
package tools // pins the programs that this module builds
import _ "github.com/containerd/containerd/v2/cmd/containerd"

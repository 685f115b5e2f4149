//go:build tools
package tools // pins the programs that this module builds
import _ "github.com/rhysd/actionlint/cmd/actionlint"

package names

// Reserved are domains that a hosted runner lives on: GitHub's own, the cloud that it runs in, where its packages come from. No
// gateway gets them, whatever policy says, because a runner that loses them is cancelled, and because whoever answers for them
// owns the job. Sources: GitHub's list of domains that self-hosted runners need, and the addresses of hosted images' mirrors.
var Reserved = []string{
	"github.com", "github.dev", "github.io", "githubapp.com", "githubassets.com", "githubusercontent.com", "githubcopilot.com",
	"ghcr.io", "ghe.com", "actions.githubusercontent.com",
	"windows.net", "azure.com", "azure.net", "azureedge.net", "azurefd.net", "azurewebsites.net", "microsoft.com", "microsoftonline.com",
	"windowsupdate.com", "visualstudio.com", "trafficmanager.net", "internal.cloudapp.net", "metadata.google.internal",
	"apple.com", "icloud.com",
	"ubuntu.com", "debian.org", "docker.com", "docker.io", "npmjs.org", "npmjs.com", "golang.org", "crates.io", "rubygems.org",
	"pypi.org", "pythonhosted.org",
	"localhost", "local", "in-addr.arpa", "ip6.arpa", "resolver.arpa", "root-servers.net",
}
